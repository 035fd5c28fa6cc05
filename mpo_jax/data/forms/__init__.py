"""Forms of rows: what data sets are written like. A file's form is found by all its rows' columns."""
