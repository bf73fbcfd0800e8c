-- The one process that writes has put its model there before; the server need not look it up again for each post.
ALTER TABLE posts DROP CONSTRAINT posts_model_fkey;
