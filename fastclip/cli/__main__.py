"""`python -m fastclip.cli`."""

from fastclip.cli import main

main()
