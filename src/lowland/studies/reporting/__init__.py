"""What a study shows: numbers, tests, figures and pages."""
