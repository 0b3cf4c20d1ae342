"""`python -m deploy` is `sparkmoe`."""

from deploy.cli.main import main

main()
