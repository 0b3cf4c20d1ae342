"""`python -m deploy` runs the `sparkmoe` command."""

from deploy.cli.main import main

main()
