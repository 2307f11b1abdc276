"""Hosts: processes that run stages for a pipeline in another one."""
