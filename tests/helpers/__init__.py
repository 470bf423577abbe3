"""What tests of several folders share: small models, runs, checkpoints. Imported as `from helpers.NAME import …`."""
