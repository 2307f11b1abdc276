"""The pages, one thin file each; figures/ computes what they show."""
