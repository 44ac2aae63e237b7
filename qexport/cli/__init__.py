"""The command line: parse -> spec -> one library call -> print."""
