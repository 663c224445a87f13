"""What can be set: the schema, the presets, and how YAML files and overrides become one frozen config."""
