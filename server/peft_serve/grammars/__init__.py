"""Answers of a given form: JSON by a schema, a regular expression, one of several texts, a grammar."""
