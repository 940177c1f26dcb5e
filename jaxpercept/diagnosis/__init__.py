"""What this machine can do, and what a checkpoint is, as reports that JSON can hold.

`machine` and `probes` try the machine out. `inspection` looks through a checkpoint's files, with
`diffusers_folder` and `exports`, and fills what `stored` describes; `checkpoint` and `prediction`
say what is wrong with it and what predict would do. `text` puts a report into words.
"""
