"""Backup and restore of a whole cluster, to and from any file system that pyarrow reaches.

| file | subject |
|---|---|
| `target.py` | the place of backups: whole files in, whole files out, by name |
| `format.py` | what a backup consists of: manifest, parts with timelines and items, list of cold files |
| `dumping.py` | timelines of one storage group at a strong snapshot (script) |
| `cold_files.py` | cold files out of the cluster, and into another one, verified on the way |
| `taking.py` | takes a backup |
| `reading.py` | reads one: all that is read is checked |
| `checking.py` | checks one without restoring it |
| `links.py` | links of the restored cluster, whose blocks may lie in other files than they did |
| `restoring.py` | restores one |
"""
