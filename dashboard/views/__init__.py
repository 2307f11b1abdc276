"""The pages: a file each, thin; what they show is worked out in the modules above."""
