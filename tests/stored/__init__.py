"""An app whose handlers use a database, in every way that there is."""
