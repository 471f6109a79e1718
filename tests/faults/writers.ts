/**
 * Who changes files in the cluster of cluster.ts, and what must be there when all has come to rest.
 *
 * Some names are changed through one member only: there the last change that was acknowledged counts, to the byte. The
 * others are changed through whichever member comes next, by one writer or by all: there two changes may meet, and then
 * what was acknowledged is under its name, or beside it as a conflict copy, or a later change has taken its place.
 */
import { appendFileSync, existsSync, mkdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { ExitStatus } from "../../protocol.ts";
import { type Files, randomBytes, runClient, seeded } from "../fixtures.ts";

const KIB = 1024;
/** Larger than what moves in one frame. */
const LARGE_BYTES = 4 * KIB * KIB;
const OWN_NAMES = 6;
const ROAMING_NAMES = 4;
const SHARED_NAMES = 5;
const TREES = 3;
/** `NAME.conflict-NODE-TIME.ext`, with a number where there are several: see replica.ts. */
const CONFLICT = /^(.*)\.conflict-[0-9a-f]{8}-\d{8}T\d{6}Z(?:-\d+)?(\.[^./]*)?$/;
/** How a client may fail while servers die, stop and run out of room under it. */
const FAILED: ReadonlySet<number> = new Set([
  ExitStatus.lost,
  ExitStatus.server,
  ExitStatus.notFound,
  ExitStatus.changed,
  ExitStatus.refused,
]);

const DIRECT = join(import.meta.dir, "direct.ts");

type Random = ReturnType<typeof seeded>;

// ---------------------------------------------------------------------------------------------------- history

/** What a name may hold: a digest as treeOf has it, or nothing. */
type Content = string;
const NOTHING: Content = "nothing";

interface Change {
  path: string;
  content: Content;
  startedAt: number;
  endedAt: number;
  isAcknowledged: boolean;
  by: string;
}

/** All that was asked for, and how it ended. */
export class History {
  readonly #changes: Change[] = [];
  /** Of the names that are changed in one place: what each may hold at the end. */
  readonly #own = new Map<string, Set<Content>>();

  /** From now on these names may hold that; returns what is called once they do for sure. */
  begin(contents: [path: string, content: Content][], isOwn: boolean, by: string): () => void {
    const startedAt = performance.now();
    const changes = contents.map(([path, content]) => {
      const change = { path, content, startedAt, endedAt: Number.POSITIVE_INFINITY, isAcknowledged: false, by };
      if (isOwn) this.#own.set(path, new Set([...this.mayHold(path), content]));
      this.#changes.push(change);
      return change;
    });
    return () => {
      for (const change of changes) {
        Object.assign(change, { endedAt: performance.now(), isAcknowledged: true });
        if (isOwn) this.#own.set(change.path, new Set([change.content]));
      }
    };
  }

  mayHold(path: string): Set<Content> {
    return this.#own.get(path) ?? new Set([NOTHING]);
  }

  /** Of the names that are changed in one place, those below a folder that may hold something. */
  below(folder: string): string[] {
    const paths = [...this.#own.keys()].filter((path) => path.startsWith(`${folder}/`));
    return paths.filter((path) => [...this.mayHold(path)].some((content) => content !== NOTHING));
  }

  /** All of it, to be read afterwards: a line each. */
  toString(): string {
    return this.#changes.map((change) => JSON.stringify(change)).join("\n");
  }

  get acknowledged(): number {
    return this.#changes.filter(({ isAcknowledged }) => isAcknowledged).length;
  }

  /** What is wrong with a tree in which all has come to rest: a line each. */
  faultsOf(lines: string[]): string[] {
    const tree = filesOf(lines);
    return [...this.#faultsOfOwn(tree), ...this.#faultsOfOthers(tree), ...this.#strangers(tree)];
  }

  #faultsOfOwn(tree: Map<string, Content>): string[] {
    return [...this.#own].flatMap(([path, allowed]) => {
      const there = tree.get(path) ?? NOTHING;
      if (allowed.has(there)) return [];
      return [
        `"${path}" holds ${this.#tell(there)}, and not ${[...allowed].map((one) => this.#tell(one)).join(" or ")}`,
      ];
    });
  }

  #faultsOfOthers(tree: Map<string, Content>): string[] {
    const kept = new Set([...tree].map(([path, content]) => `${namesake(path)} ${content}`));
    // A removal that nobody has answered may have been made, too.
    const isThere = ({ path, content }: Change) =>
      content === NOTHING ? !tree.has(path) : kept.has(`${path} ${content}`);
    const others = this.#changes.filter(({ path }) => !this.#own.has(path));
    return others
      .filter((change) => change.isAcknowledged && change.content !== NOTHING && !isThere(change))
      .filter((change) => !others.some((later) => isAfter(later, change) && (later.isAcknowledged || isThere(later))))
      .map(({ path, content }) => `"${path}" had ${this.#tell(content)}, which is lost`);
  }

  /** What nobody has put under such a name, whole. */
  #strangers(tree: Map<string, Content>): string[] {
    const known = new Set(this.#changes.map(({ path, content }) => `${path} ${content}`));
    return [...tree].flatMap(([path, content]) => {
      const name = namesake(path);
      if (!known.has(`${name} ${content}`)) return [`"${path}" holds what nobody has put there`];
      return name !== path && this.#own.has(name) ? [`"${path}" is a conflict, and one place alone changed it`] : [];
    });
  }

  #tell(content: Content): string {
    const change = this.#changes.find((one) => one.content === content);
    if (content === NOTHING || !change) return content;
    const { by, isAcknowledged, startedAt } = change;
    return `${content} (${by} at ${Math.round(startedAt)}${isAcknowledged ? "" : ", not acknowledged"})`;
  }
}

function isAfter(later: Change, change: Change): boolean {
  return later !== change && later.path === change.path && later.endedAt > change.startedAt;
}

/** Files by name, of what treeOf has found. */
function filesOf(lines: string[]): Map<string, Content> {
  const matches = lines.map((line) => /^(.*) file \d+ -?\d+ ([0-9a-f]+)$/.exec(line)).filter((match) => match !== null);
  return new Map(matches.map(([, path, digest]) => [path!, digest!]));
}

/** The name that a conflict copy was meant to have. */
function namesake(path: string): string {
  const [, stem, extension = ""] = CONFLICT.exec(path) ?? [];
  return stem === undefined ? path : stem + extension;
}

export function digestOf(content: Uint8Array): Content {
  return Bun.hash(content).toString(16);
}

// ---------------------------------------------------------------------------------------------------- writers

/** What writers share. */
export interface World {
  readonly seed: number;
  /** Of writers' own folders. */
  readonly home: string;
  readonly history: History;
  readonly env: Record<string, string>;
  /** By the name of the node. */
  readonly addresses: ReadonlyMap<string, string>;
  /** Where clients are sent on, rather than answered; undefined among equals, each of which does both. */
  readonly master: string | undefined;
  /** No further change is to be begun. */
  isOver(): boolean;
  count(what: string): void;
  fault(text: string): void;
  say(text: string): void;
  /** A reader had nothing for so long. */
  paused(ms: number): void;
}

/** What they need to be there: a put makes no folders above a name. */
export function foldersFor(writers: number, nodes: string[]): Files {
  const own = Array.from({ length: writers }, (_, number) =>
    nodes.map((node) => `own/w${number}/${node}/moved/`),
  ).flat();
  return Object.fromEntries([...own, "roaming/", "shared/", "outside/"].map((folder) => [folder, ""]));
}

/** Through real clients. */
export class ClientWriter {
  readonly #world: World;
  readonly #name: string;
  readonly #folder: string;

  constructor(world: World, number: number) {
    this.#world = world;
    this.#name = `w${number}`;
    this.#folder = join(world.home, this.#name);
    mkdirSync(join(this.#folder, "logs"), { recursive: true });
  }

  async run(): Promise<void> {
    for (let turn = 0; !this.#world.isOver(); turn++)
      await this.#turn(seeded(Bun.hash.xxHash32(`${this.#world.seed} ${this.#name} ${turn}`)));
  }

  #turn(random: Random): Promise<void> {
    const nodes = [...this.#world.addresses.keys()].filter((name) => name !== this.#world.master);
    const node = nodes[random(nodes.length)]!;
    const anywhere = [...this.#world.addresses.keys()][random(this.#world.addresses.size)]!;
    const own = `own/${this.#name}/${node}`;
    switch (random(10)) {
      case 0:
      case 1:
        return this.#put(node, `${own}/${random(OWN_NAMES)}.txt`, 1 + random(8 * KIB), random, true);
      case 2:
        return this.#put(node, `${own}/large${random(2)}.bin`, 1 + random(LARGE_BYTES), random, true);
      case 3:
        return this.#putTree(node, `${own}/tree${random(TREES)}`, random);
      case 4:
        return this.#remove(node, `${own}/${random(OWN_NAMES)}.txt`, true);
      case 5:
        return this.#move(node, own, random);
      case 6:
        return random(2) === 0 ? this.#makeFolder(node, own, random) : this.#removeTree(node, own, random);
      case 7:
        return this.#put(
          anywhere,
          `roaming/${this.#name}-${random(ROAMING_NAMES)}`,
          1 + random(600 * KIB),
          random,
          false,
        );
      case 8:
        return this.#put(anywhere, `shared/${random(SHARED_NAMES)}.txt`, 1 + random(64 * KIB), random, false);
      default:
        return random(4) === 0
          ? this.#remove(anywhere, `shared/${random(SHARED_NAMES)}.txt`, false)
          : this.#put(anywhere, `shared/${random(SHARED_NAMES)}.txt`, 1 + random(64 * KIB), random, false);
    }
  }

  async #put(node: string, path: string, length: number, random: Random, isOwn: boolean): Promise<void> {
    const content = randomBytes(length, 1 + random(2 ** 31));
    writeFileSync(join(this.#folder, "file"), content);
    await this.#change("put", node, ["put", "file", "-t", path, "-d", "logs"], [[path, digestOf(content)]], isOwn);
  }

  async #putTree(node: string, path: string, random: Random): Promise<void> {
    const folder = join(this.#folder, "tree");
    rmSync(folder, { recursive: true, force: true });
    const contents = Array.from({ length: 1 + random(12) }, (_, index): [string, Content] => {
      const name = `${random(2) === 0 ? "" : `d${random(3)}/`}${index}`;
      const content = randomBytes(1 + random(16 * KIB), 1 + random(2 ** 31));
      mkdirSync(dirname(join(folder, name)), { recursive: true });
      writeFileSync(join(folder, name), content);
      return [`${path}/tree/${name}`, digestOf(content)];
    });
    await this.#change("put -r", node, ["put", "-r", "tree", "-t", `${path}/`, "-d", "logs"], contents, true);
  }

  async #remove(node: string, path: string, isOwn: boolean): Promise<void> {
    await this.#change("rm", node, ["rm", path], [[path, NOTHING]], isOwn);
  }

  async #removeTree(node: string, own: string, random: Random): Promise<void> {
    const path = `${own}/tree${random(TREES)}`;
    const contents = this.#world.history.below(path).map((file): [string, Content] => [file, NOTHING]);
    await this.#change("rm -r", node, ["rm", "-r", path], contents, true);
  }

  /** To a name that nothing has, so that it is known what it holds then. */
  async #move(node: string, own: string, random: Random): Promise<void> {
    const from = `${own}/${random(OWN_NAMES)}.txt`;
    const [content, ...others] = this.#world.history.mayHold(from);
    if (others.length > 0 || content === NOTHING) return;
    const to = `${own}/moved/${random(2 ** 20)}.txt`;
    if (!this.#world.history.mayHold(to).has(NOTHING)) return;
    await this.#change(
      "mv",
      node,
      ["mv", from, to],
      [
        [from, NOTHING],
        [to, content!],
      ],
      true,
    );
  }

  async #makeFolder(node: string, own: string, random: Random): Promise<void> {
    await this.#change("mkdir", node, ["mkdir", `${own}/folder${random(OWN_NAMES)}`], [], true);
  }

  async #change(
    kind: string,
    node: string,
    args: string[],
    contents: [string, Content][],
    isOwn: boolean,
  ): Promise<void> {
    const { history, addresses, env } = this.#world;
    const done = history.begin(contents, isOwn, `${this.#name} ${kind} at ${node}`);
    const words = [...args, "--retries", "3", "--timeout", "10", "--quiet"];
    const run = await runClient(addresses.get(node)!, words, {
      cwd: this.#folder,
      env,
      script: this.#scriptFor(isOwn),
    });
    this.#world.count(`${kind}: ${run.status === 0 ? "acknowledged" : `status ${run.status}`}`);
    if (run.status === 0) done();
    else if (!FAILED.has(run.status) || run.errors.trim() === "")
      this.#world.fault(`${this.#name}: ${args.join(" ")} at ${node} ended with status ${run.status}: ${run.errors}`);
  }

  /** What is changed in one place alone must not be sent on by it. */
  #scriptFor(isOwn: boolean): string | undefined {
    return isOwn && this.#world.master === undefined ? DIRECT : undefined;
  }
}

interface FileChange {
  kind: string;
  /** Undefined: none is there any more. */
  contents: [path: string, content: Uint8Array | undefined][];
  work: () => void;
}

/** As any other program would, in the root itself. */
export class FileWriter {
  readonly #world: World;
  readonly #node: string;
  readonly #root: string;

  constructor(world: World, node: string, root: string) {
    this.#world = world;
    this.#node = node;
    this.#root = root;
  }

  async run(): Promise<void> {
    for (let turn = 0; !this.#world.isOver(); turn++) {
      const random = seeded(Bun.hash.xxHash32(`${this.#world.seed} ${this.#node} files ${turn}`));
      await Bun.sleep(20 + random(400));
      const { kind, contents, work } = this.#next(random);
      const changes = contents.map(([path, content]): [string, Content] => [
        path,
        content ? digestOf(content) : NOTHING,
      ]);
      const done = this.#world.history.begin(changes, true, `files ${kind} at ${this.#node}`);
      work();
      done();
      this.#world.count(`in a root: ${kind}`);
    }
  }

  #next(random: Random): FileChange {
    const path = `outside/${this.#node}/d${random(3)}/${random(OWN_NAMES)}.txt`;
    const file = join(this.#root, path);
    const isThere = existsSync(file);
    mkdirSync(dirname(file), { recursive: true });
    const content = randomBytes(1 + random(200 * KIB), 1 + random(2 ** 31));
    switch (isThere ? random(5) : 0) {
      case 0:
        return { kind: "write", contents: [[path, content]], work: () => writeFileSync(file, content) };
      case 1: {
        const temporary = join(this.#root, ".reprise-test-next.part");
        writeFileSync(temporary, content);
        return { kind: "replace", contents: [[path, content]], work: () => renameSync(temporary, file) };
      }
      case 2: {
        const longer = Buffer.concat([readFileSync(file), content.subarray(0, 100)]);
        return {
          kind: "append",
          contents: [[path, longer]],
          work: () => appendFileSync(file, content.subarray(0, 100)),
        };
      }
      case 3:
        return { kind: "remove", contents: [[path, undefined]], work: () => rmSync(file) };
      default: {
        const to = `outside/${this.#node}/moved/${random(2 ** 20)}.txt`;
        const moved = join(this.#root, to);
        mkdirSync(dirname(moved), { recursive: true });
        const contents: [string, Uint8Array | undefined][] = [
          [path, undefined],
          [to, readFileSync(file)],
        ];
        return { kind: "rename", contents: contents, work: () => renameSync(file, moved) };
      }
    }
  }
}
