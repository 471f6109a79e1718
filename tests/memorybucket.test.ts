/** A root on S3 against a bucket in memory: what else happens at just that moment, and what real engines do too rarely. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { Bucket } from "../bucket.ts";
import type { S3 } from "../s3.ts";
import { TEST_MS } from "./fixtures.ts";

setDefaultTimeout(TEST_MS);

/** Minutes if each were compared with all before it. */
test("300,000 files in one folder are listed in the time that they take", async () => {
  const pages = 300;
  const s3 = {
    list: async (_prefix: string, { token = "0" }: { token?: string }) => ({
      objects: Array.from({ length: 1000 }, (_, index) => ({
        key: `file ${String(Number(token) * 1000 + index).padStart(6, "0")}`,
        size: 1,
        etag: "e",
        modified: "",
      })),
      prefixes: [],
      next: Number(token) + 1 < pages ? String(Number(token) + 1) : undefined,
    }),
    head: async () => ({ size: 1, etag: "e", modifiedMs: 0, mtime: undefined }),
  };
  let files = 0;
  for await (const entries of new Bucket(s3 as unknown as S3, "", {}).root.list("", true)) files += entries.length;
  expect(files).toBe(pages * 1000);
});
