"""Tables, pages, drawings and plots of results; knows nothing of UNets."""
