/** The client of S3 against gateways of the test's own: what real ones send too rarely, or never should. */

import { heapStats } from "bun:jsc";
import { expect, setDefaultTimeout, test } from "bun:test";
import { S3 } from "../s3.ts";
import { TEST_MS } from "./fixtures.ts";

setDefaultTimeout(TEST_MS);

/** What answers as `answer` does; and its client. */
function gatewayOf(answer: (request: Request) => Response | Promise<Response>) {
  const server = Bun.serve({ port: 0, hostname: "127.0.0.1", fetch: answer });
  const endpoint = `http://127.0.0.1:${server.port}`;
  return {
    endpoint,
    s3: new S3({ bucket: "tests", region: "r", endpoint, accessKeyId: "ID", secretAccessKey: "SECRET" }),
    [Symbol.dispose]: () => void server.stop(true),
  };
}

test("a request that is answered leaves nothing behind that waits for its time to be over", async () => {
  using gateway = gatewayOf(() => new Response(null, { headers: { etag: '"e"', "content-length": "0" } }));
  const signals = () => {
    Bun.gc(true);
    return heapStats().objectTypeCounts.AbortSignal ?? 0;
  };
  const stop = new AbortController();
  const limits = { signal: stop.signal };
  await gateway.s3.head("a", limits);
  const before = signals();
  for (let round = 0; round < 50; round++)
    await Promise.all(Array.from({ length: 20 }, (_, at) => gateway.s3.head("a", at % 2 ? limits : undefined)));
  expect(signals() - before).toBeLessThan(100);
});

test("a request ends when its time is over, and when it is wanted no more", async () => {
  using gateway = gatewayOf(() => new Promise(() => {}));
  const late = await gateway.s3.head("a", { withinMs: 50 }).catch((error) => error);
  expect([late.code, late.message]).toEqual(["Unreachable", `${gateway.endpoint} does not answer: no answer in time`]);
  const stop = new AbortController();
  const stopped = gateway.s3.head("a", { signal: stop.signal }).catch(({ code }) => code);
  stop.abort();
  expect(await stopped).toBe("Unreachable");
  expect(await gateway.s3.head("a", { signal: stop.signal }).catch(({ code }) => code)).toBe("Unreachable");
});
