"""Program `nri-memtierd`: what the runtime says -> an engine for each container that a class asks one for."""
