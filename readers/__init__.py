"""Files and schemas of the outside world, read into the plain records that prepare.py knows. Begin at documents.py."""
