"""What is raised for a data set that cannot be read."""


class DataError(ValueError):
    """A file or folder is missing, truncated, or holds something else; the message names it."""
