"""The data of studies: carried by packages, or read from local files."""
