"""HTTP: the native, OpenAI and TGI route families over one engine call."""
