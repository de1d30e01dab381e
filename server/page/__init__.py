"""The page at `/`: its files, as a browser gets them. They are served as they lie here; nothing is built."""
