"""Load on a server that runs already: what is sent and when, how replies are read, what the samples say together."""
