"""Networks of your own: `builder: "networks.example:build"` in params.yaml calls `build` in example.py."""
