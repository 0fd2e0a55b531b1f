"""How a model is spread over processes. Tasks and models never import this room; strategies apply it from external_launcher."""
