"""`ablab ui` in a real browser, on cells that were trained for real."""
