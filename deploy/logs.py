"""What our processes write to the log: plain Ray actors write nothing below WARNING by themselves."""

import logging

ROOMS = ("deploy", "experts", "router")


def configure() -> None:
    """Our INFO lines go to stderr, which Ray keeps in its log files, unless a handler takes them already. Idempotent."""
    for room in ROOMS:
        logger = logging.getLogger(room)
        logger.setLevel(logging.INFO)
        if not logger.hasHandlers():
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
            logger.addHandler(handler)
