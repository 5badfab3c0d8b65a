"""`eva train` as a script, for the `program` of a sweep."""

import sys

from eva.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
