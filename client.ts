#!/usr/bin/env bun
/**
 * The reprise client: brings files to and from a reprise server, whole, through any interruption.
 *
 * ```sh
 * bun client.ts get photo.png                  # into client_root/
 * bun client.ts get -r holiday -d /tmp         # a folder
 * bun client.ts cat notes.txt | wc             # or into a pipe
 * bun client.ts put report.pdf -t papers/      # the other way, if the server is --writable
 * tar c . | bun client.ts put - -t backup.tar
 * bun client.ts sync holiday ~/holiday --server 192.0.2.7:2121
 * bun client.ts                                # resumes what was interrupted, then prompts
 * ```
 *
 * As a library: `Remote`, with a method for each action; importing this file starts nothing.
 */
import { basename, join } from "node:path";
import {
  type Args,
  type Command,
  command,
  isTerminal,
  numberOption,
  print,
  printable,
  runScript,
  say,
  usage,
} from "./command.ts";
import {
  type Context,
  common,
  credentialsOf,
  destination,
  forEach,
  remoteJoin,
  resolveRemote,
  serverOf,
  withContext,
} from "./context.ts";
import { version } from "./package.json";
import { type Entry, quote, RepriseError, toJson } from "./protocol.ts";
import { parseServers, Remote } from "./remote.ts";
import { MAX_SEGMENTS } from "./resume.ts";
import { FolderLog, getOne, jsonEntry, lookAt, putOne, resumeAll } from "./transfer.ts";
import type { LocalRoot, RemoteRoot, Tally, TreeOptions } from "./tree.ts";

export { parseServers, Remote };

/** A listing that is shown sorted is held in memory; a longer one comes in the server's order. */
const MAX_SORTED = 100_000;
/** Lines that are written together. */
const PRINTED_TOGETHER = 1000;

// ---------------------------------------------------------------------------------------------------- get, cat

const recursive = { type: "boolean", alias: "r", description: "Folders, with all that is in them" } as const;
const noClobber = { type: "boolean", alias: "n", description: "Leave what is there already as it is" } as const;

const get = command({
  meta: { name: "get", description: "Get files, going on where an earlier attempt was cut" },
  examples: [
    "client.ts get photo.png",
    "client.ts get photo.png -o /tmp/p.png",
    "client.ts get -r holiday -d /tmp",
    "client.ts get '*.png' '**/2024/*'",
    "client.ts get film.mkv --segments 4",
    "client.ts get notes.txt -o - | wc",
  ],
  args: {
    "path…": { type: "positional", description: "Files on the server, or patterns such as '*.png'" },
    ...common,
    ...destination,
    output: { type: "string", alias: "o", valueHint: "file", description: "Name for the file; - is standard output" },
    recursive,
    segments: { type: "string", valueHint: "number", description: "Connections that share one large file" },
  },
  run: withContext(async (context, args) => {
    const output = args.output as string | undefined;
    if (output === "") throw usage("-o needs a name");
    const segments = args.segments === undefined ? 1 : numberOption(args, "segments", { min: 1, max: MAX_SEGMENTS });
    const words = args._.map((path) => resolveRemote(context.folder, path));
    const isTree = args.recursive === true;
    if (output === "-") return getStreams(context, words, isTree);
    const roots = await expandAll(context.remote, words);
    if (output !== undefined && roots.length > 1) throw usage("-o takes one file, use -d for several");
    const directory = String(args.directory);
    checkTwins(roots.map(({ path, name }) => ({ source: path, destination: output ?? join(directory, name) })));
    const [only] = roots;
    const isFolder = isTree && roots.length === 1 && (await context.remote.stat(only!.path)).kind === "folder";
    if (only && roots.length === 1 && !isFolder)
      return getOne(context, only.path, output ?? join(directory, only.name), segments);
    const { getAll } = await import("./treeget.ts");
    const options = { ...TREE, recursive: isTree, directory };
    await finish(
      output === undefined
        ? getAll(context, roots, directory, options)
        : getAll(context, [{ ...only!, name: "" }], output, options),
    );
  }),
});

const cat = command({
  meta: { name: "cat", description: "Write files to standard output, one after the other" },
  examples: ["client.ts cat notes.txt | wc", "client.ts cat part1 part2 > whole"],
  args: { "path…": { type: "positional", description: "Files on the server, or patterns such as '*.png'" }, ...common },
  run: withContext(async (context, args) => {
    const words = args._.map((path) => resolveRemote(context.folder, path));
    await getStreams(context, words, false);
  }),
});

async function getStreams(context: Context, words: string[], isTree: boolean): Promise<void> {
  if (isTree) throw usage("a folder does not go to standard output");
  const roots = await expandAll(context.remote, words);
  await forEach(roots, ({ path }) => getOne(context, path, "-"));
}

// ---------------------------------------------------------------------------------------------------- put

const put = command({
  meta: { name: "put", description: "Put files, going on where an earlier attempt was cut" },
  examples: [
    "client.ts put report.pdf",
    "client.ts put report.pdf -t papers/",
    "client.ts put -r holiday -t photos",
    "tar c . | client.ts put - -t backup.tar",
  ],
  args: {
    "file…": { type: "positional", description: "Local files; - is standard input" },
    ...common,
    target: { type: "string", alias: "t", valueHint: "path", description: "Folder or name on the server" },
    recursive,
    "no-clobber": noClobber,
    "if-etag": { type: "string", valueHint: "etag", description: "Only in place of this version on the server" },
    size: { type: "string", valueHint: "bytes", description: "What standard input must have, or nothing is put" },
    directory: { ...destination.directory, description: "Folder for resume logs" },
  },
  run: withContext(async (context, args) => {
    const files = args._;
    const etag = String(args["if-etag"] ?? "");
    const isTree = args.recursive === true;
    if (files.length > 1 && files.includes("-")) throw usage("- is put alone");
    if (etag !== "" && (files.length > 1 || isTree)) throw usage("--if-etag is about one file");
    const target = args.target === undefined ? undefined : String(args.target);
    const settings = {
      noClobber: args["no-clobber"] === true,
      etag,
      directory: String(args.directory),
      expected:
        args.size === undefined ? undefined : numberOption(args, "size", { min: 0, max: Number.MAX_SAFE_INTEGER }),
    };
    if (settings.expected !== undefined && files[0] !== "-") throw usage("--size is about standard input");
    if (files[0] === "-" && (target === undefined || target.endsWith("/"))) throw usage("put - needs -t NAME");
    const path = resolveRemote(context.folder, target ?? "");
    const log = new FolderLog(settings.directory, files[0]!, path, context.server);
    const goesOn = isTree && files.length === 1 && target?.endsWith("/") === false && log.isThere;
    if (goesOn) say("info", `going on with ${printable(files[0]!)} as ${printable(path)}`);
    const isFolder = !goesOn && (files.length > 1 || (await namesFolder(context, target)));
    if (files[0] === "-" && isFolder) throw new RepriseError("not_a_file", `not a file: ${quote(path)} is a folder`);
    if (files.length === 1 && !(isTree && lookAt(files[0]!)?.isDirectory())) {
      const [file] = files as [string];
      return putOne(context, file, isFolder ? remoteJoin(path, basename(file)) : path, settings);
    }
    const roots: LocalRoot[] = files.map((file) => ({ file, name: isFolder ? nameOf(file) : "" }));
    checkTwins(roots.map(({ file, name }) => ({ source: file, destination: remoteJoin(path, name) })));
    const { putAll } = await import("./treeput.ts");
    const run = () => putAll(context, roots, path, { ...TREE, ...settings, recursive: isTree });
    await finish(isFolder ? run() : log.around(run));
  }),
});

/** Whether -t names a folder to put into: by a slash behind it, or because there is one. The root is one. */
async function namesFolder(context: Context, target: string | undefined): Promise<boolean> {
  if (target === undefined || target.endsWith("/")) return true;
  try {
    return (await context.remote.stat(resolveRemote(context.folder, target))).kind === "folder";
  } catch (error) {
    if (error instanceof RepriseError && error.code === "not_found") return false;
    throw error;
  }
}

/** "." and ".." have no name to be put under: what is in them is meant. */
function nameOf(file: string): string {
  const name = basename(file);
  return name === "." || name === ".." || name === "" ? "" : name;
}

// ---------------------------------------------------------------------------------------------------- sync

const sync = command({
  meta: { name: "sync", description: "Make a local folder equal one on the server, sending only what differs" },
  examples: [
    "client.ts sync holiday ~/holiday",
    "client.ts sync --up holiday ~/holiday          # the other way round: the server's becomes equal",
    "client.ts sync --delete --dry-run holiday ~/holiday",
  ],
  args: {
    remote: { type: "positional", description: "Folder on the server; / is all of it" },
    local: { type: "positional", description: "Local folder" },
    ...common,
    up: { type: "boolean", description: "Make the folder on the server equal the local one" },
    delete: { type: "boolean", description: "Remove what the other side does not have" },
    "dry-run": { type: "boolean", description: "Only print what would be done" },
    checksum: { type: "boolean", alias: "c", description: "Compare content instead of size and time" },
    force: { type: "boolean", alias: "f", description: "With --delete: also if that removes everything" },
    directory: { ...destination.directory, description: "Folder for resume logs of uploads" },
  },
  run: withContext(async (context, args) => {
    const path = resolveRemote(context.folder, String(args.remote));
    const local = String(args.local);
    const options: TreeOptions = {
      ...TREE,
      recursive: true,
      delete: args.delete === true,
      dryRun: args["dry-run"] === true,
      checksum: args.checksum === true,
      force: args.force === true,
      directory: String(args.directory),
    };
    const run = args.up
      ? (await import("./treeput.ts")).putAll(context, [{ file: local, name: "" }], path, options)
      : (await import("./treeget.ts")).getAll(context, [{ path, name: "" }], local, options);
    await finish(run, !options.dryRun);
  }),
});

const TREE: TreeOptions = {
  recursive: false,
  delete: false,
  force: false,
  dryRun: false,
  checksum: false,
  noClobber: false,
  directory: "client_root",
};

/** Says what was done, to a person, or where that is the point of it. */
async function finish(run: Promise<Tally>, isSaid = isTerminal(2)): Promise<void> {
  const tally = await run;
  if (!isSaid) return;
  const { summary } = await import("./tree.ts");
  say("info", summary(tally));
}

// ---------------------------------------------------------------------------------------------------- rm, mv, mkdir

const rm = command({
  meta: { name: "rm", description: "Remove files on the server" },
  examples: ["client.ts rm old.txt", "client.ts rm -r holiday", "client.ts rm '*.tmp'"],
  args: {
    "path…": { type: "positional", description: "Files on the server, or patterns such as '*.tmp'" },
    ...common,
    recursive,
  },
  run: withContext(async (context, args) => {
    const roots = await expandAll(
      context.remote,
      args._.map((path) => resolveRemote(context.folder, path)),
    );
    await forEach(roots, async ({ path }) => {
      await context.remote.remove(path, args.recursive === true);
      if (context.json) await print(toJson({ action: "delete", path }));
    });
  }),
});

const mv = command({
  meta: { name: "mv", description: "Rename a file or folder on the server, or move several into a folder" },
  examples: ["client.ts mv draft.txt final.txt", "client.ts mv a.png b.png pictures/"],
  args: {
    "path…": { type: "positional", description: "Files or folders on the server, the last one where they go" },
    ...common,
    force: { type: "boolean", alias: "f", description: "Replace a file that has the new name" },
  },
  run: withContext(async (context, args) => {
    const target = args._.pop();
    if (target === undefined || args._.length === 0) throw usage("mv needs what to move, and where to");
    const isFolder = await namesFolder(context, target);
    const to = resolveRemote(context.folder, target);
    if (!isFolder && args._.length > 1) throw new RepriseError("not_a_folder", `not a folder: ${quote(to)}`);
    await forEach(args._, async (word) => {
      const path = resolveRemote(context.folder, word);
      const destination = isFolder ? remoteJoin(to, basename(path)) : to;
      await context.remote.move(path, destination, args.force === true);
      if (context.json) await print(toJson({ action: "move", path, to: destination }));
    });
  }),
});

const mkdir = command({
  meta: { name: "mkdir", description: "Make folders on the server" },
  examples: ["client.ts mkdir papers", "client.ts mkdir -p papers/2024/may"],
  args: {
    "path…": { type: "positional", description: "Folders on the server" },
    ...common,
    parents: { type: "boolean", alias: "p", description: "With the folders above, and no error if it is there" },
  },
  run: withContext(async (context, args) => {
    await forEach(args._, async (word) => {
      const path = resolveRemote(context.folder, word);
      await context.remote.makeFolder(path, args.parents === true);
      if (context.json) await print(toJson({ action: "mkdir", path }));
    });
  }),
});

// ---------------------------------------------------------------------------------------------------- ls, stat, others

const ls = command({
  meta: { name: "ls", description: "List a folder" },
  examples: ["client.ts ls -l papers", "client.ts ls '*.png'", "client.ts ls -r --json | jq .size"],
  args: {
    path: { type: "positional", required: false, description: "Folder on the server, or a pattern" },
    ...common,
    long: { type: "boolean", alias: "l", description: "With size and time" },
    recursive: { type: "boolean", alias: "r", description: "With the folders below" },
  },
  run: withContext(async (context, args) => {
    const path = resolveRemote(context.folder, String(args.path ?? ""));
    const entries = listing(context.remote, path, args.recursive === true);
    if (context.json) return printEntries(entries, (some) => some.map((entry) => toJson(jsonEntry(entry))).join("\n"));
    const { formatListing } = await import("./terminal.ts");
    await printEntries(entries, (some) => formatListing(some, args.long === true), MAX_SORTED);
  }),
});

/** So many at a time, which is also what is sorted. */
async function printEntries(
  entries: AsyncIterable<Entry>,
  format: (entries: Entry[]) => string,
  together = PRINTED_TOGETHER,
): Promise<void> {
  let some: Entry[] = [];
  for await (const entry of entries) {
    some.push(entry);
    if (some.length < together) continue;
    await print(format(some));
    some = [];
  }
  if (some.length > 0) await print(format(some));
}

const stat = command({
  meta: { name: "stat", description: "Show what is known of a file or folder" },
  examples: ["client.ts stat photo.png", "client.ts stat photo.png --json | jq -r .etag"],
  args: { path: { type: "positional", description: "File or folder on the server" }, ...common },
  run: withContext(async (context, args) => {
    const path = resolveRemote(context.folder, String(args.path));
    const meta = await context.remote.stat(path);
    const shown = { ...jsonEntry({ ...meta, path }), etag: meta.etag };
    if (context.json) return print(toJson(shown));
    await printFields(shown);
  }),
});

const resume = command({
  meta: { name: "resume", description: "Go on with every interrupted transfer" },
  examples: ["client.ts resume", "client.ts resume -d /tmp"],
  args: { ...common, ...destination },
  run: withContext(async (context, args) => {
    const found = await resumeAll(context, String(args.directory));
    if (found === 0) say("info", "nothing to resume");
  }),
});

const status = command({
  meta: { name: "status", description: "Show the server's version, workers and replicas" },
  examples: ["client.ts status", "client.ts status --json"],
  args: common,
  run: withContext(async (context) => {
    // Of the server that was named, rather than of one that it sends to.
    const remote = context.connectTo(context.server, { direct: true });
    try {
      const info = await remote.status();
      if (context.json) return await print(toJson(info));
      const { formatStatus } = await import("./terminal.ts");
      await print(formatStatus(info));
    } finally {
      remote.close();
    }
  }),
});

const completion = command({
  meta: { name: "completion", description: "Print the script that completes these commands in a shell" },
  examples: ["source <(bun client.ts completion bash)", "bun client.ts completion fish | source"],
  args: { shell: { type: "positional", valueHint: "bash|zsh|fish", description: "Shell that reads the script" } },
  async run({ args }) {
    const { completionScript } = await import("./completion.ts");
    await print(completionScript(String(args.shell), main));
  },
});

/** What the scripts ask. Tab has no use for an error: without an answer there are no names. */
const completeNames = command({
  meta: { name: "complete", hidden: true, description: "Print the names on the server that a word can become" },
  args: { word: { type: "positional", required: false, description: "Name on the server" }, server: common.server },
  async run({ args }) {
    const options = args as unknown as Args;
    const { remoteNames } = await import("./prompt.ts");
    const ask = async () => {
      const remote = { servers: parseServers(serverOf(options)), ...credentialsOf(options) };
      return remoteNames(remote, undefined, String(options.word ?? ""));
    };
    const names = await ask().catch(() => []);
    if (names.length > 0) await print(names.join("\n"));
  },
});

const commands = { get, put, cat, ls, stat, rm, mv, mkdir, sync, resume, status };

export const main: Command = command({
  meta: { name: "client.ts", version, description: "reprise client: files, whole, through any interruption" },
  args: { ...common, ...destination },
  subCommands: { ...commands, completion, complete: completeNames },
  run: withContext(async (context, args) => {
    const { prompt } = await import("./prompt.ts");
    await prompt(main, commands, context, args);
  }),
});

// ---------------------------------------------------------------------------------------------------- names

/** What words name on the server: themselves, or the files that match a pattern, by their last name. */
async function expandAll(remote: Remote, words: string[]): Promise<RemoteRoot[]> {
  const roots: RemoteRoot[] = [];
  for (const word of words) {
    const paths = /[*?[{]/.test(word) ? await expand(remote, word) : [word];
    roots.push(...paths.map((path) => ({ path, name: basename(path) })));
  }
  return roots;
}

/** A name that is there is meant as it is, whatever letters it has. Throws `not_found` where nothing matches. */
async function expand(remote: Remote, pattern: string): Promise<string[]> {
  if (await isThere(remote, pattern)) return [pattern];
  const segments = pattern.split("/");
  const fixed = segments
    .slice(
      0,
      segments.findIndex((segment) => /[*?[{]/.test(segment)),
    )
    .join("/");
  const patterns = segments.slice(fixed === "" ? 0 : fixed.split("/").length);
  const isDeep = patterns.length > 1 || /[{]|^[*][*]$/.test(patterns[0]!);
  const glob = new Bun.Glob(pattern);
  const found: string[] = [];
  for await (const { path } of remote.list(fixed, isDeep)) {
    const whole = remoteJoin(fixed, path);
    if (glob.match(whole)) found.push(whole);
  }
  if (found.length === 0) throw new RepriseError("not_found", `not found: nothing matches ${quote(pattern)}`);
  return found.sort();
}

async function isThere(remote: Remote, path: string): Promise<boolean> {
  try {
    return Boolean(await remote.stat(path));
  } catch (error) {
    if (error instanceof RepriseError && ["not_found", "bad_name"].includes(error.code)) return false;
    throw error;
  }
}

/** A folder's entries, or what matches a pattern; a file lists itself. */
async function* listing(remote: Remote, path: string, isRecursive: boolean): AsyncGenerator<Entry> {
  if (/[*?[{]/.test(path)) {
    for (const found of await expand(remote, path)) yield { ...(await remote.stat(found)), path: found };
    return;
  }
  try {
    yield* remote.list(path, isRecursive);
  } catch (error) {
    if (!(error instanceof RepriseError) || error.code !== "not_a_folder") throw error;
    yield { ...(await remote.stat(path)), path: basename(path) };
  }
}

async function printFields(fields: Record<string, unknown>): Promise<void> {
  const { formatFields } = await import("./terminal.ts");
  await print(formatFields(fields));
}

function checkTwins(pairs: { source: string; destination: string }[]): void {
  const seen = new Map<string, string>();
  for (const { source, destination } of pairs) {
    const twin = seen.get(destination);
    if (twin !== undefined && twin !== source) {
      throw usage(`${quote(twin)} and ${quote(source)} would both be written to ${quote(destination)}`);
    }
    seen.set(destination, source);
  }
}

if (import.meta.main) await runScript(main);
