"""One file a library that holds weights in few bits."""
