"""`python -m qexport`."""

from qexport.cli.main import main

if __name__ == "__main__":
    main()
