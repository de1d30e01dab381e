"""Answers that must spell something: JSON after a schema, any JSON object, a Lark grammar. The matching is llguidance's."""
