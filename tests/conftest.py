"""Ray clusters that tests start have a token of their own: Ray reads it when it is imported."""

import os
import secrets

os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
