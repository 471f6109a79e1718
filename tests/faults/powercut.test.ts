/**
 * The power fails while clients put, replace, move and remove: what the server has acknowledged is on the disk, whole,
 * and of what it was about to do, all or nothing.
 *
 *     REPRISE_FAULTS=all bun test tests/faults/powercut.test.ts    20 rounds in place of 3
 *     REPRISE_FAULTS=7 bun test tests/faults/powercut.test.ts      beginning with another seed
 */
import { expect, setDefaultTimeout, test } from "bun:test";
import { readdirSync, readFileSync, renameSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { MAX_CONTENT_BYTES } from "../../protocol.ts";
import { parseServers, Remote } from "../../remote.ts";
import type { Source } from "../../source.ts";
import { newId } from "../../transfer.ts";
import { randomBytes, runClient, startServer, TEST_MS, temporaryFolder } from "../fixtures.ts";
import { type Disk, mountDisk, whyNoDisk } from "./ext4.ts";

const WANTED = process.env.REPRISE_FAULTS ?? "1";
const ROUNDS = WANTED === "all" ? 20 : 3;
const FIRST_SEED = WANTED === "all" ? 1 : Number(WANTED);
setDefaultTimeout(ROUNDS * TEST_MS);

const missing = await whyNoDisk();
if (missing) console.log(`skipped: the power cut: ${missing}`);

/** All of the small disk may be used. */
const WRITABLE = ["--writable", "--keep-free", "0"];
/** Each works in a folder of its own, one change after the other. */
const LANES = 6;
/** Changes acknowledged before the cut, over all lanes. */
const MIN_DONE = 20;
const MAX_DONE = 120;
const MAX_BYTES = 3 * MAX_CONTENT_BYTES;
const NAMES = ["a", "b", "c", "d"];

/** Numbers below `most`, the same for the same seed. */
type Random = (most: number) => number;

function seeded(seed: number): Random {
  let state = seed * 2_654_435_761 || 1;
  return (most) => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return (state >>> 0) % most;
  };
}

/** Paths below a lane's folder; of a file its content's hash, of a folder "folder". */
type Tree = Map<string, string>;

/** What a lane knows to be there, and what may be there in its place, since nobody answered. */
interface Lane {
  folder: string;
  acknowledged: Tree;
  inFlight: Tree | undefined;
}

/** A version of the name that all lanes write: between these two ticks it was sent and acknowledged. */
interface Shared {
  hash: string;
  begun: number;
  done: number;
}

class MemorySource implements Source {
  readonly name = "memory";
  readonly size: number;
  readonly mtime = Date.now() * 1000;
  readonly #bytes: Uint8Array;

  constructor(bytes: Uint8Array) {
    this.#bytes = bytes;
    this.size = bytes.length;
  }
  async read(offset: number, into: Uint8Array): Promise<number> {
    const piece = this.#bytes.subarray(offset, offset + into.length);
    into.set(piece);
    return piece.length;
  }
  async sum(offset: number, length: number): Promise<number> {
    return Bun.hash.crc32(this.#bytes.subarray(offset, offset + length));
  }
  verify(): void {}
  renew(): void {}
  close(): void {}
}

function hashOf(bytes: Uint8Array): string {
  return Bun.hash(bytes).toString(16);
}

function put(remote: Remote, path: string, bytes: Uint8Array): Promise<unknown> {
  const id = bytes.length > MAX_CONTENT_BYTES ? newId() : "";
  const options = { path, id, noClobber: false, etag: "", parents: false };
  return remote.upload(options, new MemorySource(bytes));
}

/** Small ones for the most part, some that come in several frames. */
function newContent(random: Random): Uint8Array {
  const length = random(4) === 0 ? MAX_CONTENT_BYTES + random(MAX_BYTES - MAX_CONTENT_BYTES) : random(20_000);
  return randomBytes(length, random(1 << 30) + 1);
}

/** One change at random: how the tree is after it, and the doing of it. */
function nextChange(lane: Lane, remote: Remote, random: Random): { after: Tree; make: () => Promise<unknown> } {
  const after = new Map(lane.acknowledged);
  const files = [...after].filter(([, what]) => what !== "folder").map(([path]) => path);
  const folders = ["", ...[...after].filter(([, what]) => what === "folder").map(([path]) => `${path}/`)];
  const place = `${folders[random(folders.length)]}${NAMES[random(NAMES.length)]}`;
  const there = after.get(place);
  const kind = random(10);
  if (kind === 0 && there === undefined && folders.length < 4) {
    after.set(place, "folder");
    return { after, make: () => remote.makeFolder(`${lane.folder}/${place}`) };
  }
  if (kind === 1 && there !== undefined) {
    for (const path of after.keys()) if (path === place || path.startsWith(`${place}/`)) after.delete(path);
    return { after, make: () => remote.remove(`${lane.folder}/${place}`, true) };
  }
  const file = files[random(Math.max(1, files.length))];
  if (kind === 2 && file !== undefined && file !== place && there !== "folder") {
    after.set(place, after.get(file)!);
    after.delete(file);
    return { after, make: () => remote.move(`${lane.folder}/${file}`, `${lane.folder}/${place}`, true) };
  }
  const target = there === "folder" ? `${place}/${NAMES[0]}` : place;
  if (after.get(target) === "folder") return nextChange(lane, remote, random);
  const bytes = newContent(random);
  after.set(target, hashOf(bytes));
  return { after, make: () => put(remote, `${lane.folder}/${target}`, bytes) };
}

class Round {
  readonly lanes: Lane[];
  readonly shared: Shared[] = [];
  readonly #address: string;
  readonly #seed: number;
  #tick = 0;
  #done = 0;
  #isOver = false;

  constructor(address: string, seed: number) {
    this.#address = address;
    this.#seed = seed;
    this.lanes = Array.from({ length: LANES }, (_, index) => {
      return { folder: `lane-${index}`, acknowledged: new Map(), inFlight: undefined };
    });
  }

  /** All lanes at work until the cut, which `cut` is; each ends with what failed for it. */
  async run(cut: () => void): Promise<void> {
    const random = seeded(this.#seed);
    const wanted = MIN_DONE + random(MAX_DONE - MIN_DONE);
    await this.#makeFolders();
    const { promise: enough, resolve } = Promise.withResolvers<void>();
    const lanes = this.lanes.map((lane, index) =>
      this.#work(lane, seeded(this.#seed * 100 + index + 1), () => ++this.#done === wanted && resolve()),
    );
    // A lane that ends before the cut has met something else.
    await Promise.race([enough, ...lanes]);
    expect(this.#done).toBe(wanted);
    for (let turns = random(50); turns > 0; turns--) await new Promise((resume) => setImmediate(resume));
    this.#isOver = true;
    cut();
    await Promise.all(lanes);
  }

  async #makeFolders(): Promise<void> {
    const remote = this.#connect();
    for (const { folder } of this.lanes) await remote.makeFolder(folder);
    remote.close();
  }

  #connect(): Remote {
    return new Remote({ servers: parseServers(this.#address), retries: 0, timeoutMs: 20_000 });
  }

  async #work(lane: Lane, random: Random, done: () => void): Promise<void> {
    const remote = this.#connect();
    try {
      for (;;) {
        const change = nextChange(lane, remote, random);
        lane.inFlight = change.after;
        await change.make();
        lane.acknowledged = change.after;
        lane.inFlight = undefined;
        done();
        if (random(5) === 0) await this.#putShared(remote, newContent(random));
      }
    } catch (error) {
      if (!this.#isOver) throw error;
    } finally {
      remote.close();
    }
  }

  async #putShared(remote: Remote, bytes: Uint8Array): Promise<void> {
    const version = { hash: hashOf(bytes), begun: ++this.#tick, done: Number.POSITIVE_INFINITY };
    this.shared.push(version);
    await put(remote, "shared", bytes);
    version.done = ++this.#tick;
  }

  /** What the disk has and should not, or has not and should. */
  problems(root: string): string[] {
    const lanes = this.lanes.flatMap(({ folder, acknowledged, inFlight }) => {
      const found = treeOf(join(root, folder));
      if (isEqual(found, acknowledged) || (inFlight && isEqual(found, inFlight))) return [];
      return [`${folder}: ${show(found)}, not ${show(acknowledged)}${inFlight ? ` or ${show(inFlight)}` : ""}`];
    });
    return [...lanes, ...this.#problemsOfShared(root)];
  }

  /** One version that was sent, and none that an acknowledged one had replaced when it was begun. */
  #problemsOfShared(root: string): string[] {
    const hash = treeOf(root).get("shared");
    const found = this.shared.find((version) => version.hash === hash);
    if (hash !== undefined && !found) return [`shared: ${hash} was never sent`];
    const newer = this.shared.find(({ begun, done }) => done < Number.POSITIVE_INFINITY && begun > (found?.done ?? 0));
    return newer ? [`shared: ${hash}, in place of ${newer.hash}`] : [];
  }
}

function treeOf(root: string, below = "", tree: Tree = new Map()): Tree {
  for (const entry of readdirSync(join(root, below), { withFileTypes: true })) {
    const path = below === "" ? entry.name : `${below}/${entry.name}`;
    tree.set(path, entry.isDirectory() ? "folder" : hashOf(readFileSync(join(root, path))));
    if (entry.isDirectory()) treeOf(root, path, tree);
  }
  return tree;
}

function isEqual(a: Tree, b: Tree): boolean {
  return a.size === b.size && [...a].every(([path, what]) => b.get(path) === what);
}

function show(tree: Tree): string {
  return JSON.stringify(Object.fromEntries([...tree].sort()));
}

/** What nobody synced is lost: else nothing was cut. */
function writeControl(disk: Disk): string {
  const control = join(disk.path, "control");
  writeFileSync(`${control}.new`, "not synced");
  renameSync(`${control}.new`, control);
  return control;
}

function isLost(control: string): boolean {
  try {
    return readFileSync(control, "utf8") !== "not synced";
  } catch {
    return true;
  }
}

test.skipIf(missing !== undefined).each(Array.from({ length: ROUNDS }, (_, index) => FIRST_SEED + index))(
  "after a power cut every acknowledged change is there, whole (seed %i)",
  async (seed) => {
    await using disk = await mountDisk("64M");
    let round: Round;
    let control = "";
    {
      await using server = await startServer(disk.path, { args: WRITABLE });
      round = new Round(server.address, seed);
      await round.run(() => {
        control = writeControl(disk);
        disk.cutPower();
      });
    }
    await disk.mountAgain();
    expect(isLost(control)).toBe(true);
    expect(round.problems(disk.path)).toEqual([]);
    await expectUsable(disk);
  },
);

/** A server goes on with what is left. */
async function expectUsable(disk: Disk): Promise<void> {
  using local = temporaryFolder();
  await using server = await startServer(disk.path, { args: WRITABLE });
  writeFileSync(join(local.path, "again"), randomBytes(MAX_BYTES));
  expect(await runClient(server.address, ["put", "again"], { cwd: local.path })).toMatchObject({ status: 0 });
  expect(hashOf(readFileSync(join(disk.path, "again")))).toBe(hashOf(randomBytes(MAX_BYTES)));
}
