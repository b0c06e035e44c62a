"""Data planes. Each module holds one transport; ``base`` holds the interface, ``testing`` the conformance suite."""
