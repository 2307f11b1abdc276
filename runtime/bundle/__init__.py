"""The bundle on disk: its manifest and files, and the stages that are stitched from its parts."""
