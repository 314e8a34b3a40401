"""What finished runs came to: ``python -m recipes.report outputs/...`` writes the table, the plots and one page."""
