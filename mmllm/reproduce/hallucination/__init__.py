"""The honest experiment: does any decoding method reduce hallucination in a small model with a planted prior?"""
