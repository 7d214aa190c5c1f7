"""Reports and what they are made of: tables, pictures, plots, pages and progress; knows nothing of who measured."""
