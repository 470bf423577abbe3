"""Small tools that know nothing of models: private names of libraries, fields, progress, output."""
