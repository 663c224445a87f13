"""`python -m onelabel.orchestrator`: the command line, for jobs that run from a checkout."""

from onelabel.orchestrator.cli import main

main()
