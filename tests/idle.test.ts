/** What a client costs the server that stays and says nothing. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { readdirSync, readFileSync, rmSync } from "node:fs";
import { join } from "node:path";
import { encodeHello, encodeRequest } from "../protocol.ts";
import { type Heap, heapEnvironment } from "./bench/heap.ts";
import {
  connectRaw,
  makeRoot,
  type RawConnection,
  startServer,
  TEST_MS,
  temporaryFolder,
  waitFor,
} from "./fixtures.ts";

setDefaultTimeout(TEST_MS);

const CONNECTIONS = 200;
/** Its own state and its socket; a function that waits for it would be five or more. */
const MAX_OBJECTS_EACH = 16;

/** Objects in the worker's heap that live. */
async function countObjects(worker: number, folder: string): Promise<number> {
  const path = join(folder, `${worker}.heap`);
  process.kill(worker, "SIGUSR2");
  const heap = await waitFor("the heap is measured", () => {
    try {
      return JSON.parse(readFileSync(path, "utf8")) as Heap;
    } catch {
      // Not yet there.
      return undefined;
    }
  });
  rmSync(path);
  return heap.objects;
}

const countDescriptors = (pid: number) => readdirSync(`/proc/${pid}/fd`).length;

const STATUS = encodeRequest({ action: "status" });

test.each([
  ["before HELLO", []],
  ["after the greeting", [encodeHello()]],
  ["after a request", [encodeHello(), STATUS]],
])("an idle connection is few objects (%s)", async (_, frames) => {
  using root = makeRoot({ a: "a" });
  using folder = temporaryFolder();
  const env = heapEnvironment(folder.path);
  await using server = await startServer(root.path, { args: ["--workers", "1"], env });
  const [worker] = server.workers() as [number];
  using connections = new DisposableStack();
  const connect = async (): Promise<RawConnection> => {
    const connection = connections.use(await connectRaw(server.port));
    for (const [index, frame] of frames.entries()) {
      const { length } = connection.received();
      connection.socket.write(frame);
      await waitFor(`answer ${index}`, () => connection.received().length > length);
    }
    return connection;
  };
  // The first of all bring what all use.
  for (let index = 0; index < 10; index++) await connect();
  const before = await countObjects(worker, folder.path);
  const sockets = countDescriptors(worker);
  for (let index = 0; index < CONNECTIONS; index++) await connect();
  await waitFor("all are accepted", () => countDescriptors(worker) >= sockets + CONNECTIONS);
  // Some are still on their way through the door.
  let each = Number.POSITIVE_INFINITY;
  await waitFor(`less than ${MAX_OBJECTS_EACH} objects each`, async () => {
    each = ((await countObjects(worker, folder.path)) - before) / CONNECTIONS;
    return each < MAX_OBJECTS_EACH;
  });
  expect(each).toBeGreaterThan(0);
});
