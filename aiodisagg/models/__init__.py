"""Model families: how a prompt is planned, an item encoded, and a language half run. Import the submodules."""
