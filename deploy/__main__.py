"""`python -m deploy` is `sparkmoe`."""

from deploy.cli import main

main()
