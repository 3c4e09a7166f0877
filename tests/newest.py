"""What cannot work with the newest releases of the libraries: a test's file and name, and why.

make test-newest expects each of these to fail, and prints the reasons. Nothing else may fail there."""

CANNOT_WORK: dict[str, str] = {}
