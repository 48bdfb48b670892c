"""Find, download, read, convert, merge and write weights, in every layout that is read here."""
