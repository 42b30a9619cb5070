"""A small engine on jaxcache: four families of decoders, an OpenAI-compatible server, a demonstration.

`models` is what a jitted step computes, `engine` puts it on memory and scheduler, `server` puts that on the network,
`demo` measures what the prefix cache saves. Tokens are bytes, and weights come from a seed: there is nothing to load.
"""
