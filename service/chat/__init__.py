"""A chat request between HTTP and the model: what may be asked, room for it, the run, what is written."""
