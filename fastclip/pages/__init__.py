"""One-file HTML pages with pictures, for reports; needs `fastclip[report]`."""
