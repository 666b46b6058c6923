"""Profile: a joint graph becomes storages, bytes and times."""
