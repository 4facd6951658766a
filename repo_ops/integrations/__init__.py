"""Our head and our objectives inside trainers that people already run: one module a host, imported by name.

Nothing here is imported by `import repo_ops`; each module imports its host when it is used.
"""
